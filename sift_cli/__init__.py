"""sift: sparse fine-tuning of pre-trained models."""

__version__ = "0.1.0"
