"""`dept report`: what happened in a run, as one HTML page that needs no network."""
