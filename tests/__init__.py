import vembed_fs2  # noqa: F401  (loads libsndfile; spawned processes import this package, not the conftest)
