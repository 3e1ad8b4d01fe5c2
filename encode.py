from smalti.encode import main

if __name__ == "__main__":
    main()
