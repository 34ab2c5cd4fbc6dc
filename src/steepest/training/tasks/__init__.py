"""One module per task family; `ENTRIES` of each is what the registry collects."""
