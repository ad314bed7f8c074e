"""The ground floor, torch only: the contract between data, models, engine and objectives."""
