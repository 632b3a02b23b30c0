pytest_plugins = ["support.seeding"]
