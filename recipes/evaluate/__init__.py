"""The recipe that measures retrieval, on one process or on a gang."""
