"""fastmoe inside Hugging Face transformers."""
