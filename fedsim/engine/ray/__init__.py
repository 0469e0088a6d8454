"""Ray actors as workers: the engine, the cluster, and how calls travel."""
