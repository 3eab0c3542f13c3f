"""The plan of anybody's model: shapes, storage, owners and bytes, without starting anything."""
