"""What is measured: our store, its peers, and the machine's own limits, one file each."""
