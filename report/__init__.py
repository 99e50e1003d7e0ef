"""Tables, the report page, figures."""
