"""Human speech with transcripts in Debian packages: three sources, one module each."""
