"""Functions of other packages as implementations of ops, one module per op and package.

These are optional: `vfmtok_fast.switch` imports ``<op>_<package>`` when the op is enabled and the
package is installed. Each module also holds ``trial``, which finds out whether the package works
here before the first call is passed to it.
"""
