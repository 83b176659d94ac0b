"""One LightningModule file per method family; ``base.py`` holds the release seam."""
