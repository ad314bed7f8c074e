from vembed_fs2.recipes.launch import main

main("train")
