"""Operations on arrays: each a plain reference and its implementations."""
