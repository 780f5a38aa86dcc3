# Install and export of the daemon and the client.
include(GNUInstallDirs)
