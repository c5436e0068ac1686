"""Builders: clips and responders in, preference rows out. They meet the trainer only in the rows."""
