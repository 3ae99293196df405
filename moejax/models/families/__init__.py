"""Model families, one file each: a key table, and a function that reads the family's config."""
