package PBA::Test::StoreLife::Known;

# Remembers which images Qcow2Chain found right by qemu-img and qemu-nbd, for as long as they do not change: starts of these
# programs take most of the processor time of a life. What was found wrong is not remembered.
#
#   remember_intact();    # from now on

use v5.36;

use Exporter qw(import);
use Time::HiRes ();

use PVE::BackupAccess::Provider::Qcow2Chain::Content ();

our @EXPORT_OK = qw(remember_intact);

my $most = 10_000;
my %known;

# What differs after any of the files has changed: nobody can set back the time at which an inode changed.
my sub state_of (@files) {
    return join(' ', map { join(',', (Time::HiRes::stat($_))[0, 1, 7, 10]) } @files);
}

# The same of the device's images that an image may build on, which have older names, and of the image itself.
my sub state_of_chain ($image) {
    my ($guest, $name) = $image =~ m{\A(.*)/[^/]+/([^/]+)\z} or return undef;
    return state_of(grep { $_ le $image } glob("$guest/*/$name"));
}

# The state of the image that the arguments of qemu-img name; undef: it has to run.
my sub key_of ($command, @arguments) {
    return undef if $command !~ m/\A(?:check|info|map)\z/;
    my ($file) = $arguments[-1] =~ m/\Ajson:.*"filename":"([^"\\]+)"/;
    return "$command " . (defined($file) ? state_of($file) : state_of_chain($arguments[-1]));
}

# Runs the code, unless it is known what it returns in this state. is_right: whether that may be remembered.
my sub unless_known ($key, $is_right, $code) {
    return $code->() if !defined($key);
    return $known{$key} if exists($known{$key});
    my $result = $code->();
    %known = () if keys %known > $most;
    $known{$key} = $result if $is_right->($result);
    return $result;
}

my sub has_status_0 ($result) { return $result->[0] == 0 }

my sub replace ($package, $name, $code) {
    my $former = $package->can($name);
    no strict 'refs';
    no warnings 'redefine';
    *{"${package}::$name"} = sub (@arguments) { $code->($former, @arguments) };
    return;
}

my sub run_program ($former, $program, @arguments) {
    return unless_known(key_of(@arguments), \&has_status_0,
        sub () { [$former->($program, @arguments)] })->@*;
}

my sub run_program_to_file ($former, $program, @arguments) {
    my $read = sub () {
        my ($status, $file, $message) = $former->($program, @arguments);
        local $/ = undef;
        return [$status, scalar(<$file>), $message];
    };
    my ($status, $text, $message)
        = unless_known(key_of(@arguments), \&has_status_0, $read)->@*;
    open(my $file, '<', \$text) or die "cannot open a text: $!\n";
    return ($status, $file, $message);
}

my sub damage ($former, $archive, $device) {
    my $key = join(' ',
        'damage',
        state_of_chain($archive->image($device)),
        state_of($archive->digests($device)));
    return unless_known(
        $key,
        sub ($damage) { !$damage->@* },
        sub () { [$former->($archive, $device)] }
    )->@*;
}

sub remember_intact () {
    my $provider = 'PVE::BackupAccess::Provider::Qcow2Chain';
    replace("${provider}::Image", 'run_program', \&run_program);
    replace("${provider}::Image", 'run_program_to_file', \&run_program_to_file);
    replace("${provider}::Content", 'damage', \&damage);
    return;
}

1;
