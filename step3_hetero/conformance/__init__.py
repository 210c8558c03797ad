"""One suite for every backend: cases, tolerance, checks, certificates, bisect, shadow check."""
