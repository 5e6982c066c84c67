"""``metalearn verify``: prove the engines equal on this machine."""
