"""The command line: thin typer commands over `paramdiff`, which never prints."""
