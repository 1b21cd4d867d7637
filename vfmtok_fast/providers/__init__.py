"""Other packages' functions as implementations of our ops, one module per op and package.

Optional: `vfmtok_fast.switch` imports ``<op>_<package>`` when the op is enabled and the package is
installed. Such a module also holds ``trial``, which finds out whether the package works here before
the first call is let through to it.
"""
