"""Attention–FFN disaggregation: roles in processes of their own, one engine in front of them."""
