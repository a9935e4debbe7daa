"""What other runtimes need beside StableHLO: one file each, run as a script with the Python that has its toolchain.

    python export/targets/iree.py BUNDLE FOLDER iree-cpu      # writes into FOLDER, prints a JSON object

A target reads the bundle alone, and imports nothing of llamajax: toolchains pin versions that do not go together, so
each may live in an environment of its own (`llamajax export --python=PATH`). What it prints goes into the manifest.
"""
