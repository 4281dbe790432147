"""The comparison report of finished experiments: numbers worked out once, shown as Markdown, HTML and figures."""
