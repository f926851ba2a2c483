"""The generated stubs of Doorward's services. Below this package, folder, proto package and Python package are one."""
