"""`fastmoe bench`: one MoE layer's routed MLP beside every other way to compute it, timed in one run."""
