"""Layouts that others write; read, never written."""
