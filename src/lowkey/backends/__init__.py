"""How queries meet stored keys. `naive` is the definition, `grouped` the fast form for any device; same signature."""
