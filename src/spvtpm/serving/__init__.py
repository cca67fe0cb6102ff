"""What processes have in common that serve over HTTP. Knows no domain, and nothing secret."""
