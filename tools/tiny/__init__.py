"""The small Step-3 on handwritten digits: its shape, data, training, measurement and folder."""
