"""``metalearn adapt``: adapt a trained run to a user's own folders of images."""
