"""Sections of report.html, a module and a template each."""
