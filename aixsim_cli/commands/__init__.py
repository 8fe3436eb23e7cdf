"""The commands of aixsim, a file each: options in, one call, words out."""
