"""Starting runs: the ranks on one machine, and jobs on a cluster."""
