"""What depends on the device: a folder for each one, behind the interface of base.py; choose.py picks one."""
