"""Multi-task learning on tables: the experiments of Ma et al., KDD 2018. `python -m fastmoe.tabular.command` runs
them."""
