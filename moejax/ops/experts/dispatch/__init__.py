"""Dispatch: order the routed slots by expert, copy tokens to their experts' rows, and copy the results back."""
