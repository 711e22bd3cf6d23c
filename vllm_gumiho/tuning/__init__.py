"""How many tokens to draft: the paper's theory (`plan`), and a schedule measured on this machine (`tune`, "auto")."""
