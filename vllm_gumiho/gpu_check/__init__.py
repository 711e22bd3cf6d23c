"""What holds on this machine's GPU: kernels, engines in every mode, drafts, speed; a line and a record each."""
