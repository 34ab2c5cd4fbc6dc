"""One module per optimizer; `ENTRIES` of each is what the registry collects."""
