"""Where is human speech with transcripts in Debian? Three sources, one module each."""
