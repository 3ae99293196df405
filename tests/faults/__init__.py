"""What damaged, hostile or full things around a model must never do."""
