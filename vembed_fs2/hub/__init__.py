"""Finds, describes and loads models."""
