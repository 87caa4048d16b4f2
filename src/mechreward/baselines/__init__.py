"""Published methods that this library is compared with, reproduced."""
