"""`fastmoe train`: train the reference GPT, dense, as an MoE, or both side by side."""
