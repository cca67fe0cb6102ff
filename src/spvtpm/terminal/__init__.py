"""The owner's terminal: verifies a secure processor, then gives it secrets; keeps instance files and what it knows of them."""
