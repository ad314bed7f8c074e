from vembed_fs2.recipes.launch import main

main("vembed_fs2.recipes.evaluate")
