from smalti.generate import main

if __name__ == "__main__":
    main()
