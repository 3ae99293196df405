"""Registered MoE layers, one file each."""
