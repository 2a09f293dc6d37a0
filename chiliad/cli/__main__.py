from chiliad.cli import main

main()
