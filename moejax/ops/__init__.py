"""Operations on arrays: a plain reference of each one, and faster implementations."""
